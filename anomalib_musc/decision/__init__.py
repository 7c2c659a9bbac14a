# SPDX-License-Identifier: Apache-2.0
"""What is anomalous: thresholds without labels, and calibration."""
