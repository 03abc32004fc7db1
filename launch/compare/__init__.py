# SPDX-License-Identifier: Apache-2.0
"""Which of two models' clips people prefer; see `pyramid-jax compare --help`."""
