# SPDX-License-Identifier: Apache-2.0
"""A folder of unlabelled images of one product, to a table, pictures and a page on which a person decides.

python examples/folder_to_page.py path/to/images results/lot-7
"""

import sys

from anomalib_musc import predict


def main(images: str, results: str) -> None:
    """Predict, print how many are anomalous and the five that are most so, and write everything."""
    predictions = predict(images, backbone="musc-tiny", progress=True)
    print(predictions)
    print(f"Written: {predictions.save(results)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
