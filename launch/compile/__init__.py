# SPDX-License-Identifier: Apache-2.0
"""Compiles for chips that are not here; see `pyramid-jax compile --help`."""
