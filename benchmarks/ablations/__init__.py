# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations, at a size that two CPU cores can train from nothing."""
