# SPDX-License-Identifier: Apache-2.0
"""Nearest distances between the patches of images, within a memory budget; needs torch alone."""
