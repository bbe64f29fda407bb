//! Compiles the .proto files without protoc, and keeps the descriptor set for gRPC reflection.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

/// Messages of the CNI exchange: plain prost, because the plugin does not use gRPC.
const PLAIN: &[&str] = &["cni/v1/cni.proto"];
/// gRPC services, behind the feature `sync`.
const SERVICES: &[&str] = &["sync/v1/sync.proto", "debug/v1/debug.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=cni");
    println!("cargo:rerun-if-changed=sync");
    println!("cargo:rerun-if-changed=debug");
    let mut files = PLAIN.to_vec();
    if std::env::var_os("CARGO_FEATURE_SYNC").is_some() {
        files.extend(SERVICES);
    }
    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".margay.sync.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
