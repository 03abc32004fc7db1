# SPDX-License-Identifier: Apache-2.0
"""Pyramid Flow in JAX: text to video by flow matching on a pyramid of resolutions.

Importing the package touches no accelerator and loads no weights.
"""

__version__ = "0.1.0"
