//! Leads a port of the machine to the API server, which lives in a network namespace of its own.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::process;

/// Serves the listening socket that is this process's standard input, and connects from inside
/// `netns`.
///
/// A socket belongs to the namespace in which it was made, so the listener stays on the machine
/// while the process moves. It runs on one thread, which is the one that moves.
pub fn serve(netns: &Path, target: SocketAddr) -> Result<()> {
    let listener = TcpListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(true)?;
    process::enter_netns(netns)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)
            .context("standard input is not a listener")?;
        loop {
            let (mut near, _) = listener.accept().await?;
            tokio::spawn(async move {
                // Whatever goes wrong on one side, the other side sees a closed connection.
                if let Ok(mut far) = tokio::net::TcpStream::connect(target).await {
                    let _ = (near.set_nodelay(true), far.set_nodelay(true));
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }
            });
        }
    })
}
