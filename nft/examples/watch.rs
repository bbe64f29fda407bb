//! Prints what other programs do to the table `inet example-1`, until it is interrupted. Needs
//! root: `cargo run --example watch`, and `nft add table inet example-1` in another terminal.

use margay_nft::{Monitor, TableName};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut monitor = Monitor::open(TableName::new("example-1")?, &[])?;
    loop {
        while let Some(event) = monitor.try_next()? {
            println!("{event:?}");
        }
        poll(
            &mut [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)],
            PollTimeout::NONE,
        )?;
    }
}
