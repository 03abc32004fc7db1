# SPDX-License-Identifier: Apache-2.0
"""Measurements: run them as `python -m benchmarks.NAME --help`; results/ keeps some."""
