# SPDX-License-Identifier: Apache-2.0
"""A memory bank as an ONNX file, and a service that needs onnxruntime alone to compare one image after another with it.

    python examples/onnx_service.py export path/to/references exported
    python examples/onnx_service.py serve exported/weights/onnx/model.onnx 8000
    curl --data-binary @path/to/1.png http://localhost:8000

The answer is {"score": ..., "label": "normal" or "anomalous"}.
"""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
from PIL import Image


def export(references: str, folder: str) -> None:
    """Make a bank of reference images, normal or unlabelled, and write it with its backbone and threshold."""
    from anomalib.deploy import ExportType
    from anomalib.engine import Engine

    from anomalib_musc import MuSc

    model = MuSc("musc-tiny", mode="reference", references=references, visualizer=False, prediction_writer=False)
    engine = Engine(default_root_dir=folder, logger=False)
    engine.predict(model, data_path=references)  # which makes the bank
    print(engine.export(model, ExportType.ONNX, export_root=folder))


def serve(model: str, port: str) -> None:
    """Answer requests until interrupted."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Compare the image in the body with the bank."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                image = Image.open(io.BytesIO(body)).convert("RGB")
            except OSError as error:
                self.send_error(400, str(error))
                return
            pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
            score, label = session.run(["pred_score", "pred_label"], {"input": pixels})
            is_anomalous = bool(np.squeeze(label))
            answer = {"score": float(np.squeeze(score)), "label": "anomalous" if is_anomalous else "normal"}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    HTTPServer(("localhost", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    {"export": export, "serve": serve}[sys.argv[1]](*sys.argv[2:])
