# SPDX-License-Identifier: Apache-2.0
"""What works around faults of anomalib and Lightning, by version; nothing else touches their privates."""
