# SPDX-License-Identifier: Apache-2.0
"""Files of adapters, which name the layers of the original.

Every layer has a pair of tensors, "FRONT.LAYER.lora_A.weight" (rank, inputs) and
"FRONT.LAYER.lora_B.weight" (outputs, rank). The front is "transformer" for diffusers
and PEFT, "diffusion_model" for ComfyUI. What is written needs no scale: alpha is in B.

What has no low rank, such as a student's way from its teacher, is stored whole as
LyCORIS names it: "FRONT.LAYER.diff" for a weight, "FRONT.LAYER.diff_b" for a bias.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from pyramid_jax.checkpoint import rename
from pyramid_jax.checkpoint.dit_tables import TRANSFORMS, Table
from pyramid_jax.checkpoint.tensors import (
    StoredTensors,
    file_metadata,
    finite_values,
    open_safetensors,
    write_tensors,
)

FRONTS = {"diffusers": "transformer.", "comfyui": "diffusion_model."}
READ = (*FRONTS.values(), "base_model.model.", "dit.")  # what may be before a layer
WEIGHT, KERNEL = ".weight", "/kernel"  # ends of names of theirs, and of ours
PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)
WHOLE = {".diff": WEIGHT, ".diff_b": ".bias"}
# A byte for each number, which is rounded by an eighth at most: changes are small.
BYTE = np.dtype(ml_dtypes.float8_e5m2)
ALPHA = ".alpha"  # behind a layer, a number: the pair counts alpha / rank times
METADATA_KEY = "lora_adapter_metadata"  # diffusers keeps PEFT's settings there
# By the transform of a kernel, our A and B as those of the tensors that it is made of.
_PARTS: Mapping[str, tuple[str, str]] = {
    "linear": ("i r -> 1 r i", "r o -> 1 o r"),
    "scale_shift": ("i r -> 1 r i", "r o -> 1 o r"),
    "from_heads": ("heads dim r -> 1 r (heads dim)", "r o -> 1 o r"),
    "qkv": ("i three r -> three r i", "three r heads dim -> three (heads dim) r"),
}
# What becomes several kernels, one beside the other.
_SPLIT = {"from_heads_and_mlp": ("from_heads", "linear")}


@dataclass(frozen=True)
class LowRank:
    """What is added to the weight of one layer: scale · B A."""

    down: Float[np.ndarray, "rank i"]
    up: Float[np.ndarray, "o rank"]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, outputs first."""
        return len(self.up), self.down.shape[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        up, down = (np.asarray(x, np.float32) for x in (self.up, self.down))
        whole = np.float32(self.scale) * (up @ down)
        return whole if dtype is None else whole.astype(dtype, copy=False)


# What is added to tensors of the original, by their names.
Changes = dict[str, LowRank | Float[np.ndarray, "..."]]


def write_adapters(
    path: str | Path, adapters: Mapping[str, LowRank], front: str
) -> None:
    """Writes a file of adapters by layer.

    Args:
        front: what is written before the names of layers, of `FRONTS`.
    """
    down, up = PAIRS[0]
    tensors = {}
    for layer, x in adapters.items():
        tensors[f"{front}{layer}{down}"] = np.float32(x.down)
        tensors[f"{front}{layer}{up}"] = np.float32(x.scale * x.up)
    ranks = {layer: len(x.down) for layer, x in adapters.items()}
    most = max(set(ranks.values()), key=[*ranks.values()].count)
    others = {layer: rank for layer, rank in ranks.items() if rank != most}
    settings = {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(adapters),
    }
    named = {f"{FRONTS['diffusers']}{name}": x for name, x in settings.items()}
    write_tensors(path, tensors, tensors.items(), {METADATA_KEY: json.dumps(named)})


def write_differences(
    path: str | Path,
    differences: Any,
    table: Table,
    front: str,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a file of what is added to all weights, in a byte for each number.

    Args:
        differences: parameters, of which the table gives the original's tensors.
        front: what is written before the names of layers, of `FRONTS`.
        notes: what else the file says.
    """
    ends = {kind: end for end, kind in WHOLE.items()}
    tensors = {}
    for name, x in rename.export_tensors(differences, table):
        if name not in table.constants:
            layer, _, kind = name.rpartition(".")
            tensors[f"{front}{layer}{ends[f'.{kind}']}"] = x.astype(BYTE)
    write_tensors(path, tensors, tensors.items(), notes)


def read_adapters(path: str | Path) -> Changes:
    """What a file adds to tensors, whatever of the usual names it uses.

    Raises:
        ValueError: the file is missing, damaged, or holds anything else.
    """
    tensors, adapters = open_safetensors(path), {}
    settings = json.loads(file_metadata(path).get(METADATA_KEY, "{}"))
    settings = {key.removeprefix(READ[0]): x for key, x in settings.items()}
    for down, up in PAIRS:
        for name in [name for name in tensors if name.endswith(down)]:
            stem = name.removesuffix(down)
            if f"{stem}{up}" not in tensors:
                raise ValueError(f"{path} has {name} without {stem}{up}; copy it again")
            pair = (finite_values(x, tensors.pop(x)) for x in (name, f"{stem}{up}"))
            layer = _without_front(stem)
            first, second = (np.asarray(x, np.float32) for x in pair)
            scale = _scale(tensors, stem, layer, settings, len(first))
            adapters[f"{layer}{WEIGHT}"] = LowRank(first, second, scale)
    for end, kind in WHOLE.items():
        for name in [name for name in tensors if name.endswith(end)]:
            layer = _without_front(name.removesuffix(end))
            whole = finite_values(name, tensors.pop(name)).astype(np.float32)
            adapters[f"{layer}{kind}"] = whole
    if tensors or not adapters:
        raise ValueError(
            f"{path} holds {sorted(tensors)[:3] or 'nothing'}, expected pairs such as "
            f"LAYER{PAIRS[0][0]} and LAYER{PAIRS[0][1]}, or whole differences, "
            f"{' and '.join(f'LAYER{end}' for end in WHOLE)}, alone; DoRA and adapters "
            "of text encoders can't be used: save the transformer's LoRA"
        )
    return adapters


def weight_changes(
    tensors: Changes, table: Table, abstract: Any
) -> dict[str, Callable[[], np.ndarray]]:
    """What adapters add to parameters, by path; only what is called is computed.

    Args:
        tensors: what is added to those of the original.
        table, abstract: of the parameters; see `rename.convert_tensors`.

    Raises:
        ValueError: the adapters are those of another network.
    """
    specs = rename.tensor_specs(abstract, table)
    wrong = [
        f"{name} is {'unknown' if name not in specs else f'of {specs[name].shape}'}"
        for name, x in tensors.items()
        if name not in specs or specs[name].shape != x.shape
    ]
    if wrong:
        raise ValueError(
            f"the adapters are not of this model, in which {'; '.join(wrong[:3])}; "
            f"{len(wrong)} of {len(tensors)} don't fit: give those that were trained "
            "on it"
        )
    return rename.parameter_changes(tensors, table, abstract)


def layer_adapters(
    adapters: Any, scale: float, names: tuple[str, str], table: Table, abstract: Any
) -> dict[str, LowRank]:
    """Our adapters as those of the original's layers.

    Args:
        adapters: a nested dict of numpy arrays like that of the parameters.
        names: of A and B, beside their kernels.
        table, abstract: of the parameters; see `rename.convert_tensors`.
    """
    flat: dict[str, Any] = flatten_dict(adapters, sep="/")
    made = {}
    for rule, layer in rename.each_layer(table, abstract):
        kinds = _SPLIT.get(rule.transform, (rule.transform,))
        pairs = []
        for path, kind, shape in zip(rule.ours, kinds, layer.shapes, strict=False):
            stem, index = path.removesuffix(KERNEL), layer.index
            if path.endswith(KERNEL) and f"{stem}/{names[0]}" in flat:
                pair = (flat[f"{stem}/{name}"][index] for name in names)
                down, up = map(rearrange, pair, _PARTS[kind])
                swapped = TRANSFORMS[kind].swap  # the halves of the outputs
                pairs.append(
                    [down, np.roll(up, up.shape[1] // 2, 1) if swapped else up]
                )
            elif len(kinds) > 1:  # its columns stay as they are
                inputs = int(np.prod(shape[:-1]))
                empty = np.zeros((1, 0, inputs)), np.zeros((1, shape[-1], 0))
                pairs.append([*map(np.float32, empty)])
        if any(down.shape[1] for down, _ in pairs):
            keys = (key.removesuffix(WEIGHT) for key in layer.theirs)
            made |= dict(zip(keys, _joined(pairs, scale), strict=True))
    return made


def _joined(pairs: list[list[np.ndarray]], scale: float) -> Iterator[LowRank]:
    """One adapter for each tensor; maps that are side by side have inputs apart."""
    for parts in zip(*(zip(*pair, strict=True) for pair in pairs), strict=True):
        rank, inputs = (sum(down.shape[i] for down, _ in parts) for i in (0, 1))
        whole, row, column = np.zeros((rank, inputs), np.float32), 0, 0
        for down, _ in parts:
            whole[row : row + len(down), column : column + down.shape[1]] = down
            row, column = row + len(down), column + down.shape[1]
        yield LowRank(whole, np.concatenate([up for _, up in parts], axis=1), scale)


def _without_front(name: str) -> str:
    """The name of a layer, without what libraries have before it."""
    for front in READ:
        name = name.removeprefix(front)
    return name


def _scale(
    tensors: StoredTensors,
    stem: str,
    layer: str,
    settings: Mapping[str, Any],
    rank: int,
) -> float:
    """How often a pair counts: by a number in the file, by its settings, or once."""
    if f"{stem}{ALPHA}" in tensors:
        return float(np.asarray(tensors.pop(f"{stem}{ALPHA}")).item()) / rank
    alpha = settings.get("alpha_pattern", {}).get(layer, settings.get("lora_alpha"))
    return 1.0 if alpha is None else alpha / rank
