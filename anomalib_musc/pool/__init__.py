# SPDX-License-Identifier: Apache-2.0
"""The images of one dataloader: read, checked, turned into features, and scored."""
