# SPDX-License-Identifier: Apache-2.0
"""Reference images with which an image is compared on its own."""
