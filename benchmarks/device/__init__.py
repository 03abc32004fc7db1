# SPDX-License-Identifier: Apache-2.0
"""What a few minutes of an accelerator should tell: `python -m benchmarks.device`."""
