# SPDX-License-Identifier: Apache-2.0
"""Converts released models, and exports models in the original's layout.

    pyramid-jax convert --from=pyramid-flow-sd3 --variant=diffusion_transformer_384p \\
        --to=models/sd3_384p
    pyramid-jax convert --from=rain1011/pyramid-flow-miniflux --check
    pyramid-jax convert --export --from=models/sd3_384p --to=pyramid-flow-sd3-384p
    pyramid-jax convert --lora=style.safetensors --from=models/sd3 --to=models/style
    pyramid-jax convert --minus=models/sd3 --from=models/other --to=other.safetensors

--from is the folder of a released model (or its name on the hub), with --export, --lora
and --minus one of this package. --lora adds adapters to its weights; --minus writes
such a file, what has to be added to another model to get this one. --check reads
headers only, reports what is there, and exits with 1 if anything is missing, left over,
of another shape or damaged.
"""

import math
import re
import sys
from pathlib import Path

import huggingface_hub
import jax
from absl import flags

from launch import start
from launch.sample.choices import lora_files
from pyramid_jax.convert import convert, source

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/model


def main(options: flags.FlagValues) -> None:
    origin = str(options["from"].value)  # the word itself is Python's
    modes = (options.check, options.export, bool(options.lora), bool(options.minus))
    if options.check == bool(options.to) or sum(modes) > 1:
        raise ValueError(
            "give either --check, or --to=FOLDER and at most one of --export, "
            "--lora and --minus; see --help"
        )
    if options.lora:
        convert.merge_model(origin, lora_files(options.lora), options.to)
        print(f"the model with the adapters in its weights: {options.to}")
        return
    if options.minus:
        convert.save_changes(origin, options.minus, options.to)
        print(f"what is added to {options.minus}: {options.to}")
        return
    if options.export:
        convert.export_model(origin, options.to)
        print(f"the model in the original's layout: {options.to}")
        return
    if options.check:  # no accelerator is started to read headers
        jax.config.update("jax_platforms", "cpu")
    folder = released_folder(origin, options.variant)
    dit, vae = (Path(x) if x else None for x in (options.dit, options.vae))
    release = source.ReleasedFolder(folder, options.variant, dit, vae, options.text)
    if options.check:
        model = source.open_released(release)
        print(report(model))
        sys.exit(bool(model.problems))
    print(report(convert.convert_model(release, options.to)))
    print(f"the model for pyramid_jax.load: {options.to}")


def released_folder(name: str | Path, variant: str | None = None) -> Path:
    """The folder itself, or the files of a model of the hub like "owner/model".

    Args:
        variant: the transformer to download; None: all of them.

    Raises:
        ValueError: there is no such folder, and no such model can be downloaded.
    """
    if (path := Path(name)).is_dir():
        return path
    parts = (variant or f"{source.DIT}_*", source.VAE, "text_encoder*", "tokenizer*")
    patterns = [f"{part}/*" for part in parts]
    if not HUB_NAME.fullmatch(str(name)):
        raise ValueError(
            f"{name} is no folder, and no name of a model of the hub (owner/model); "
            "give the folder of a released model, or its name"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(str(name), allow_patterns=patterns)
        )
    except OSError as error:  # of the network, or a refusal of the hub
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} is no folder here, and can't be downloaded ({reason}). Download "
            f"{', '.join(patterns)} of https://huggingface.co/{name} where there is "
            "a network, keep their folders, and give the folder that holds these"
        ) from error


def report(model: source.ReleasedModel) -> str:
    """What is in the folder of a released model: its networks, and all problems."""
    problems = model.problems
    verdict = f"{len(problems)} problems:" if problems else "all fits"
    lines = [*map(_line, model.networks.values()), verdict]
    return "\n".join(lines + [f"  {problem}" for problem in problems])


def _line(network: source.ReleasedNetwork) -> str:
    tensors = network.tensors.values()
    values = sum(math.prod(x.shape) for x in tensors)
    types = ", ".join(sorted({str(x.dtype) for x in tensors}))
    return f"{network.name:<28} {len(tensors):>5} tensors {values:>15,} values  {types}"


if __name__ == "__main__":
    flags.DEFINE_string("from", None, "Folder, or name on the hub.", required=True)
    flags.DEFINE_string("variant", None, "Folder of the transformer in --from.")
    flags.DEFINE_string("dit", None, "File of other weights for the transformer.")
    flags.DEFINE_string("vae", None, "File of other weights for the VAE.")
    flags.DEFINE_bool("text", True, "Convert text encoders and tokenizers, too.")
    flags.DEFINE_string("to", None, "New folder to write to.")
    flags.DEFINE_bool("check", False, "Report what is there, and write nothing.")
    flags.DEFINE_bool("export", False, "Write the original's layout.")
    flags.DEFINE_list("lora", None, "Adapters to add, each FILE or FILE:STRENGTH.")
    flags.DEFINE_string("minus", None, "Folder of the model to write the changes of.")
    start.run(main, headings={"from": "what to read", "to": "what to do"})
