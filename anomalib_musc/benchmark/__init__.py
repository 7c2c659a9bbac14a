# SPDX-License-Identifier: Apache-2.0
"""Models side by side: one pipeline, the same images and metrics for all, and a report.

``anomalib-musc benchmark --config FILE`` runs it; :mod:`anomalib_musc.benchmark.config` describes the file. Arrows run
one way, each module importing only from lines above its own::

    records, resources, charts
    published, summary, recorder, winclip
    config, tables, gallery
    cell, report
    pipeline
"""
