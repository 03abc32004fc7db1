# SPDX-License-Identifier: Apache-2.0
"""The page of a study: it shows a rater one pair after the other, and takes answers.

It is no page of Gradio's, which plays clips one by one and names their files. A rater
sees the turns of his own order by their numbers; neither addresses nor files say from
which folder a clip is.

    /                          the page
    /turn?rater=               the rater's next turn
    /clip?rater=&turn=&side=   a clip
    /answer                    takes what the rater says, and tells the next turn
"""

import io
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.error import FFmpegError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from launch.compare.answers import Answer, AnswerFile, check_choices
from launch.compare.study import LEFT, QUESTIONS, RIGHT, Study, Turn, rater_name
from launch.start import sentence
from launch.web.limits import RequestLimits

PAGE = Path(__file__).with_name("page.html")
ADDRESSES = re.compile("/|/turn|/clip|/answer")
# Browsers may keep neither clips nor turns: the next study has the same addresses.
FRESH = {"cache-control": "no-store"}


class StudyPage(NamedTuple):
    """What the page needs: the study, and where answers go."""

    study: Study
    answers: AnswerFile

    def application(self, hosts: list[str]) -> Starlette:
        """The page for browsers that ask for it by one of these names."""
        routes = [
            Route("/", self.page),
            Route("/turn", self.turn),
            Route("/clip", self.clip),
            Route("/answer", self.answer, methods=["POST"]),
        ]
        guards = [
            Middleware(TrustedHostMiddleware, hosts),
            Middleware(RequestLimits, addresses=ADDRESSES),
        ]
        told = {ValueError: _refusal, OSError: _failure}
        return Starlette(routes=routes, middleware=guards, exception_handlers=told)

    def page(self, _: Request) -> Response:
        """The page itself."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=FRESH)

    def turn(self, request: Request) -> Response:
        """The first turn that a rater has not answered."""
        return self._next(rater_name(request.query_params.get("rater")))

    def clip(self, request: Request) -> Response:
        """The clip on one side of a turn, without what its file says of its making."""
        asked = request.query_params
        rater, side = rater_name(asked.get("rater")), asked.get("side")
        turn = self._turn(rater, asked.get("turn", ""))
        if side not in (LEFT, RIGHT):
            raise ValueError(f"side {side!r} is neither {LEFT} nor {RIGHT}")
        clip = turn.left if side == LEFT else 1 - turn.left
        path = self.study.pairs[turn.pair].clips[clip]
        try:
            file = without_comment(path)
        except ValueError as error:
            logging.error("%s", error)  # a rater must not see the path
            raise ValueError("this clip can't be read; the log says why") from error
        return Response(file, headers=FRESH, media_type="video/mp4")

    async def answer(self, request: Request) -> Response:
        """Keeps an answer; tells the next turn."""
        sent: Any = await request.json()
        if not isinstance(sent, dict):
            raise ValueError("an answer has rater, turn and choices")
        rater = rater_name(sent.get("rater"))
        turn = self._turn(rater, str(sent.get("turn")))
        choices = check_choices(sent.get("choices"))
        self.answers.add(Answer(rater, turn.pair, turn.left, choices))
        return self._next(rater)

    def _turn(self, rater: str, number: str) -> Turn:
        turns = dict(enumerate(self.study.turns(rater)))
        place = int(number) if re.fullmatch("[0-9]{1,9}", number) else None
        if place not in turns:
            raise ValueError(f"turn {number!r} is none of the {len(turns)}")
        return turns[place]

    def _next(self, rater: str) -> Response:
        turns = self.study.turns(rater)
        left = [
            number
            for number, turn in enumerate(turns)
            if not self.answers.answered(rater, turn.pair)
        ]
        told: dict[str, Any] = {"answered": len(turns) - len(left), "turns": len(turns)}
        if left:
            prompt = self.study.pairs[turns[left[0]].pair].prompt
            told |= {"turn": left[0], "prompt": prompt, "questions": dict(QUESTIONS)}
        return JSONResponse(told, headers=FRESH)


def without_comment(path: Path) -> bytes:
    """An mp4 file without its comment, which names the model; pictures stay as are.

    Raises:
        ValueError: the file is gone, or broken.
    """
    file = io.BytesIO()
    try:
        with (
            av.open(str(path.absolute())) as source,
            av.open(file, "w", format="mp4") as target,
        ):
            stream = source.streams.video[0]
            copy = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path} can't be read ({error})") from error
    return file.getvalue()


def _refusal(_: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 400)


def _failure(_: Request, error: Exception) -> Response:
    return PlainTextResponse(f"the answer was not kept: {sentence(error)}", 507)
