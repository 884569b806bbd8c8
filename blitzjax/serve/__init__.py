"""TALKS: the controller, the workers, the gRPC frontend and their clocks."""
