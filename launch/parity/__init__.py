# SPDX-License-Identifier: Apache-2.0
"""Replays what was recorded from the original implementation, tensor by tensor."""
