"""The Open Inference Protocol over gRPC. Nothing of grpc is imported before a port is opened."""

from models.serving.grpc.server import GrpcServer, serve_grpc

__all__ = ["GrpcServer", "serve_grpc"]
