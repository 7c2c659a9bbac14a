# SPDX-License-Identifier: Apache-2.0
"""The review page: one HTML file on which a person sees a pool's predictions, moves the threshold and marks images."""

from anomalib_musc.output.review.of_predictions import review_of
from anomalib_musc.output.review.page import write_review
from anomalib_musc.output.review.pictures import encode_thumbnail
from anomalib_musc.output.review.records import Card, Review

__all__ = ["Card", "Review", "encode_thumbnail", "review_of", "write_review"]
