# SPDX-License-Identifier: Apache-2.0
"""Commands: flags, a config, one call. Run them as `python -m launch.NAME --help`."""
