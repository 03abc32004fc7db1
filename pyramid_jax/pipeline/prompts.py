# SPDX-License-Identifier: Apache-2.0
"""Encodes prompts with the text encoders and tokenizers of a released model.

A released folder has `text_encoder`, `text_encoder_2`, ... and a tokenizer beside each.
One of them is a T5, whose features are what the network reads; the vectors of the
others, which are CLIPs, joined side by side, are the pooled vector.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from pyramid_jax import programs, sharding
from pyramid_jax.checkpoint import files, rename, text_tables
from pyramid_jax.checkpoint.dit_tables import Table
from pyramid_jax.checkpoint.tensors import read_tensors
from pyramid_jax.data.tokenizer import Tokenize, text_batch
from pyramid_jax.model import ModelConfig, encode_text
from pyramid_jax.models.clip import CLIPConfig, CLIPEncoder
from pyramid_jax.models.t5 import T5Config, T5Encoder
from pyramid_jax.shapes import Array, Text

logger = logging.getLogger(__name__)

# The released models expect this at the end of a prompt, and as the negative prompt.
SUFFIX = ", hyper quality, Ultra HD, 8K"
NEGATIVE = (
    "cartoon style, worst quality, low quality, blurry, absolute black, absolute white,"
    " low res, extra limbs, extra digits, misplaced objects, mutated anatomy, "
    "monochrome, horror"
)
LIMIT = 128  # tokens of T5 that the network reads
FOLDERS = ("", "_2", "_3")  # ends of the names of encoders and tokenizers

EncoderConfig = T5Config | CLIPConfig


class Network(NamedTuple):
    """One text encoder: its config and its weights."""

    cfg: EncoderConfig
    params: Any


class Ids(NamedTuple):
    """Texts as token ids, a row each: T5's with their segments, and each CLIP's."""

    words: Int[Array, "b m"]
    segment: Int[Array, "b m"]
    clips: tuple[Array, ...]


class TokenizedText(NamedTuple):
    """Token ids of a text, and the part of the text that was cut off."""

    ids: list[int]
    lost: str


@dataclass(frozen=True)
class Tokenizer:
    """Cuts a text into at most `limit` tokens, the last of which is the end.

    Args:
        tokenizer: one of transformers.
    """

    tokenizer: Any
    limit: int

    def __call__(self, text: str) -> TokenizedText:
        """The tokens of one text."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= self.limit:
            return TokenizedText(ids, "")
        last = self.limit - 1
        lost = self.tokenizer.decode(ids[last:-1]).strip()
        return TokenizedText([*ids[:last], ids[-1]], lost)


@dataclass(frozen=True)
class PromptEncoder:
    """The text encoders of a released model. Make one with `load_prompt_encoder`.

    Attributes:
        networks: T5, then the CLIPs, whose vectors, in this order, are the pooled one.
        tokenizers: one per network.
    """

    networks: tuple[Network, ...]
    tokenizers: tuple[Tokenizer, ...]

    def __call__(self, texts: Sequence[str]) -> Text:
        """Features and pooled vector of each text, in float32.

        A text has a row of its own, padded on the left to T5's limit, so that compiled
        steps fit every text. Words beyond the limit are not read; a warning shows them.

        Raises:
            ValueError: there is no text.
        """
        if not texts:
            raise ValueError('there is no text to encode; give at least one, e.g. ""')
        return encode_prompts(self.networks, self.ids(texts))

    def ids(self, texts: Sequence[str]) -> Ids:
        """The tokens of texts, cut and padded to the limits of their readers."""
        of_t5, *of_clips = self.tokenizers
        words = np.zeros((len(texts), of_t5.limit), np.int32)
        segment = np.full_like(words, -1)
        for i, text in enumerate(texts):
            ids, lost = of_t5(text)
            words[i, -len(ids) :], segment[i, -len(ids) :] = ids, 0
            if lost:
                logger.warning(
                    "%d tokens of a prompt are read, this part is not: %r",
                    of_t5.limit,
                    lost,
                )
        return Ids(words, segment, tuple(_clip_ids(t, texts) for t in of_clips))

    def parked(self) -> "PromptEncoder":
        """The same encoders, whose weights wait in the host's memory."""
        networks = (
            network._replace(params=sharding.parked(network.params))
            for network in self.networks
        )
        return replace(self, networks=tuple(networks))


def finished(prompts: Sequence[str]) -> list[str]:
    """The prompts with `SUFFIX`, as the released models expect them."""
    return [prompt + SUFFIX for prompt in prompts]


def encode_prompts(networks: Sequence[Network], ids: Ids) -> Text:
    """Features from T5, `networks[0]`, and all CLIPs' vectors side by side; float32."""
    cfgs, weights = zip(*networks, strict=True)
    with sharding.present(weights) as params:
        return _encode(cfgs, params, ids)


def read_texts(
    model: ModelConfig, params: Any, tokenize: Tokenize, texts: Sequence[str]
) -> Text:
    """What a model with a text encoder of its own makes of texts, a row each.

    Raises:
        ValueError: it has none.
    """
    if model.text is None:
        raise ValueError(
            "this model reads features of T5 and CLIP, which are not loaded; put "
            "text encoders and tokenizers into its folder, and load it with text"
        )
    ids, segment = text_batch(tokenize, texts)
    with sharding.present({"text": params["text"]}) as weights:
        return _encode_own(model, weights, ids, segment)


@partial(programs.kept, static=1)
def _encode_own(
    model: ModelConfig, params: Any, ids: Int[Array, "b m"], segment: Int[Array, "b m"]
) -> Text:
    return encode_text(model, params, ids, segment, 1)


@partial(programs.kept, static=1)
def _encode(cfgs: tuple[Any, ...], params: tuple[Any, ...], ids: Ids) -> Text:
    of_t5 = {"params": params[0]}
    features: Any = T5Encoder(cfgs[0]).apply(of_t5, ids.words, ids.segment)
    vectors = []
    for cfg, weights, words in zip(cfgs[1:], params[1:], ids.clips, strict=True):
        encoding: Any = CLIPEncoder(cfg).apply({"params": weights}, words)
        vectors.append(encoding.pooled)
    pooled = jnp.concatenate(vectors, axis=-1)[:, None]
    return Text(features, jnp.asarray(ids.segment), pooled)


# ---------------------------------------------------------------------------- loading


def load_prompt_encoder(
    folder: str | Path, dtype: str = "bfloat16", mesh: Mesh | None = None
) -> PromptEncoder:
    """The text encoders and tokenizers in a released model's folder.

    Weights are read one parameter at a time and put on their devices: of T5's 4.8 B the
    host holds 3.1 GB at once in bfloat16, and a device its share.

    Args:
        dtype: of weights and matrix products.
        mesh: devices that share the weights; None: all on the first one.

    Raises:
        ValueError: a file is missing, or does not fit the others.
    """
    folder, readers = Path(folder), list[Any]()
    for end in FOLDERS:
        encoder = folder / f"text_encoder{end}"
        if encoder.is_dir():
            config = files.read_config(encoder, "a text encoder")
            reader = network(config, read_tensors(encoder), dtype, mesh)
            beside = folder / f"tokenizer{end}"
            readers.append((reader, load_prompt_tokenizer(beside, reader.cfg)))
    readers.sort(key=lambda reader: isinstance(reader[0].cfg, CLIPConfig))
    clips = sum(isinstance(reader.cfg, CLIPConfig) for reader, _ in readers)
    if len(readers) - clips != 1 or clips == 0:
        raise ValueError(
            f"{folder} has {len(readers) - clips} T5 and {clips} CLIP encoders in "
            "text_encoder, text_encoder_2 and text_encoder_3, expected one T5 and at "
            "least one CLIP; give the folder of a released model"
        )
    networks, tokenizers = zip(*readers, strict=True)
    return PromptEncoder(networks, tokenizers)


def network(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Network:
    """The encoder that a config.json of the original describes, with its weights.

    Raises:
        ValueError: another kind of encoder, or tensors that don't fit it.
    """
    cfg = encoder_config(config, dtype)
    abstract = abstract_encoder(cfg)
    plain = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)),
        sharding.unbox(abstract),
    )
    unique, place = text_tables.unique_tensors(tensors), files.placing(abstract, mesh)
    params = rename.convert_tensors(unique, encoder_table(cfg), plain, place)
    return Network(cfg, params)


def encoder_config(config: Mapping[str, Any], dtype: str = "float32") -> EncoderConfig:
    """The encoder that a config.json of the original describes.

    Raises:
        ValueError: another kind of encoder, or one that no released model has.
    """
    if "d_model" in config:
        return T5Config(**text_tables.t5_config(config), dtype=dtype)
    if "intermediate_size" in config:
        return CLIPConfig(**text_tables.clip_config(config), dtype=dtype)
    raise ValueError(
        f"a config.json with {sorted(config)} describes neither a T5 nor a CLIP text "
        "encoder; give that of a released model"
    )


def encoder_table(cfg: EncoderConfig) -> Table:
    """The names that the original gives to the weights of an encoder like `cfg`."""
    if isinstance(cfg, T5Config):
        return text_tables.t5_table()
    return text_tables.clip_table(cfg.projection is not None)


def abstract_encoder(cfg: EncoderConfig) -> Any:
    """The shapes of an encoder's weights, in boxes that name their axes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    if isinstance(cfg, T5Config):
        encoder, inputs = T5Encoder(cfg), (ids, ids)
    else:
        encoder, inputs = CLIPEncoder(cfg), (ids,)
    return jax.eval_shape(encoder.init, jax.random.key(0), *inputs)["params"]


def load_prompt_tokenizer(folder: Path, cfg: EncoderConfig) -> Tokenizer:
    """The tokenizer in a folder, limited to the tokens that its encoder reads.

    Raises:
        ValueError: the folder lacks the files of a tokenizer.
    """
    import transformers  # slow; models that read their prompts themselves need none

    if isinstance(cfg, T5Config):
        # parity: the file alone says how T5 splits text; the class of transformers
        # would replace a part of it.
        needed, limit = ("tokenizer.json",), LIMIT
        kind = transformers.PreTrainedTokenizerFast
        make = partial(kind, tokenizer_file=str(folder / needed[0]))
    else:
        needed, limit = ("vocab.json", "merges.txt"), cfg.positions
        kind = transformers.CLIPTokenizer
        make = partial(kind.from_pretrained, folder, local_files_only=True)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {' and '.join(missing)}; copy the tokenizers of the "
            "released model beside its text encoders"
        )
    return Tokenizer(make(), limit)


def _clip_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Int[np.ndarray, "b m"]:
    """Token ids, filled up with the end: what follows the first end has no effect."""
    rows = np.zeros((len(texts), tokenizer.limit), np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids, lost = tokenizer(text)
        row[:], row[: len(ids)] = ids[-1], ids
        if lost:
            logger.info("the pooled vector is made without this part: %r", lost)
    return rows
