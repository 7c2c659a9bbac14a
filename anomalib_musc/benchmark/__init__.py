# SPDX-License-Identifier: Apache-2.0
"""Models side by side: one pipeline, the same images and metrics for all, and a report.

``anomalib-musc benchmark --config FILE`` runs it; :mod:`anomalib_musc.benchmark.config` describes the file. Arrows run
one way: records <- published, summary <- config, tables, report; config, recorder <- cell; all of them <- pipeline.
"""
