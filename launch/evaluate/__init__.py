# SPDX-License-Identifier: Apache-2.0
"""Measures: what videos show, how they look, and clips for public evaluators."""
