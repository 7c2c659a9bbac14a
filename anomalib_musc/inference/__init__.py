# SPDX-License-Identifier: Apache-2.0
"""From images, wherever they are, to predictions: the function, the service and the command."""
