# SPDX-License-Identifier: Apache-2.0
"""Commands: flags, a config, one call. Run them as `pyramid-jax NAME --help`."""

import os

# Tokenizers need no PyTorch; transformers would say at every start that it is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
