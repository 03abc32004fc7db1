# SPDX-License-Identifier: Apache-2.0
"""Bouncing pairs: the data set of the embedded text-to-video model, and its judge."""
