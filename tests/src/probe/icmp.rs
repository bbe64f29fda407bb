//! ICMP requests that the kernel of the target answers by itself: echo (type 8) and timestamp (13).

use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::{Domain, Protocol, Socket, Type};

use super::sctp::payload;

/// A question that waits for its answer.
#[derive(Debug)]
pub struct Question {
    socket: Socket,
    /// Identifier and sequence number, which the answer repeats.
    own: [u8; 4],
    answer: u8,
}

impl Question {
    /// Asks; the port of the address is the type of the question.
    pub fn send(to: SocketAddr) -> io::Result<Self> {
        let (kind, answer) = match (to.is_ipv4(), to.port()) {
            (true, 8) => (8, 0),
            (true, 13) => (13, 14),
            _ => {
                return Err(io::Error::new(
                    ErrorKind::Unsupported,
                    "nobody answers this type",
                ));
            }
        };
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        socket.set_nonblocking(true)?;
        socket.connect(&SocketAddr::new(to.ip(), 0).into())?;
        let question = Self {
            socket,
            own: fresh(),
            answer,
        };
        question.socket.send(&message(kind, question.own))?;
        Ok(question)
    }

    /// Returns whether the answer is there. Others' answers come to every raw socket, and are
    /// passed over.
    pub fn look(&self) -> io::Result<bool> {
        let mut buffer = [0; 256];
        loop {
            let length = match Read::read(&mut &self.socket, &mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                length => length?,
            };
            let answer = payload(&buffer[..length], true).unwrap_or_default();
            if answer.first() == Some(&self.answer) && answer.get(4..8) == Some(&self.own) {
                return Ok(true);
            }
        }
    }
}

impl AsFd for Question {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What no other question of this process has: tracked packets are established, and each question
/// must meet policy.
fn fresh() -> [u8; 4] {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let number = LAST.fetch_add(1, Ordering::Relaxed);
    // Connections are distinguished by the identifier, so it changes first.
    number.rotate_left(16).to_be_bytes()
}

/// A message with room for the three times of a timestamp.
fn message(kind: u8, own: [u8; 4]) -> Vec<u8> {
    let mut bytes = [&[kind, 0, 0, 0][..], &own, &[0; 12]].concat();
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    bytes[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_machine_answers_both_types_and_no_other_is_asked() {
        for kind in [8, 13] {
            let question = Question::send(SocketAddr::from(([127, 0, 0, 1], kind))).unwrap();
            while !question.look().unwrap() {
                std::thread::yield_now();
            }
        }
        for nobody in [
            SocketAddr::from(([127, 0, 0, 1], 5)),
            "[::1]:8".parse().unwrap(),
        ] {
            assert_eq!(
                Question::send(nobody).unwrap_err().kind(),
                ErrorKind::Unsupported
            );
        }
    }

    #[test]
    fn the_checksum_makes_the_sum_of_a_message_zero() {
        for own in [[0, 0, 0, 0], [0xff; 4], [1, 2, 3, 4]] {
            let sum: u32 = message(13, own)
                .chunks(2)
                .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
                .sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        }
    }

    #[test]
    fn questions_in_a_row_have_identifiers_of_their_own() {
        let identifiers: BTreeSet<[u8; 2]> = (0..100)
            .map(|_| fresh())
            .map(|own| [own[0], own[1]])
            .collect();
        assert_eq!(identifiers.len(), 100);
    }
}
