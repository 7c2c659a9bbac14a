# SPDX-License-Identifier: Apache-2.0
"""Tables, pictures, heatmaps, and files that are never half-written."""
