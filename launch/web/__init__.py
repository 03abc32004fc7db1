# SPDX-License-Identifier: Apache-2.0
"""A web page for a model; see `pyramid-jax web --help`."""
