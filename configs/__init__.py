# SPDX-License-Identifier: Apache-2.0
"""Experiments: every file returns a locked ConfigDict from `get_config(mode)`."""
