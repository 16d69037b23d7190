"""The embedded server: TensorFlow Serving's gRPC and REST API from Python.

`flags.Options` says what to serve, `app.run` serves it until a signal, `app.Server` is the same inside a
program. Nothing is imported here, so that the flags alone stay quick to import.
"""
