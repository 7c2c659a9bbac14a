# SPDX-License-Identifier: Apache-2.0
"""Ranking metrics as the paper reports them."""
