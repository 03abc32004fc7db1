# SPDX-License-Identifier: Apache-2.0
"""Captions of bouncing pairs name what is seen, in many ways."""

import numpy as np

from launch.pairs.captions import image_caption, video_caption
from launch.pairs.scene import Actor

RED, BLUE = Actor("red", "circle", "sideways"), Actor("blue", "seven", "up and down")
SAME = BLUE._replace(motion="sideways")


def texts(caption, *actors: Actor) -> list[str]:
    return [caption(actors, np.random.default_rng(i)) for i in range(200)]


def test_a_video_caption_names_colours_kinds_and_motions():
    for text in texts(video_caption, RED, BLUE):
        assert "red" in text and "blue" in text
        assert "circle" in text or "disc" in text
        assert "seven" in text or "7" in text
        assert any(w in text for w in ("side", "left and right", "horizontally"))
        assert any(w in text for w in ("up and down", "vertically", "top and bottom"))


def test_an_image_caption_names_no_motion():
    for text in texts(image_caption, RED, BLUE):
        assert "red" in text and "blue" in text
        assert not any(w in text for w in ("side to", "move", "goes", "bounce"))


def test_each_object_has_its_own_motion_and_an_equal_one_may_be_said_once():
    for text in texts(video_caption, RED, BLUE):
        assert "both" not in text
    assert any(" both " in text for text in texts(video_caption, RED, SAME))


def test_captions_vary_in_words_and_order():
    some = texts(video_caption, RED, BLUE)
    assert len(set(some)) > 150
    assert 60 < sum(text.index("red") < text.index("blue") for text in some) < 140


def test_numbers_and_verbs_agree():
    joined = "|".join(texts(video_caption, RED, SAME) + texts(video_caption, RED, BLUE))
    assert "both moves" not in joined and "both goes" not in joined
    assert "moves off" not in joined and "goes off" not in joined
