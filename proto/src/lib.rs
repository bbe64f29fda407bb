//! The wire: .proto files, generated code, and the way between wire and model.
