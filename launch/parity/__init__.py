# SPDX-License-Identifier: Apache-2.0
"""Replays values recorded from the original implementation and compares, tensor by tensor."""
