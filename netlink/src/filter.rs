//! Classic BPF programs (`linux/filter.h`): one drops notifications of our own changes, one keeps
//! the frames of a link.

use std::marker::PhantomData;

/// Offset under which the index of a frame's link is loaded (`SKF_AD_OFF` and `SKF_AD_IFINDEX`).
const LINK_OFFSET: u32 = (-0x1000_i32 + 8) as u32;
/// Offset of `nlmsg_pid` in `struct nlmsghdr` (`linux/netlink.h`).
const PORT_OFFSET: u32 = 12;

/// A program as `SO_ATTACH_FILTER` takes it: a pointer to borrowed instructions.
pub struct Filter<'a> {
    program: libc::sock_fprog,
    _instructions: PhantomData<&'a [libc::sock_filter]>,
}

impl<'a> Filter<'a> {
    /// A program of these instructions.
    pub fn new(instructions: &'a [libc::sock_filter]) -> Self {
        let len = u16::try_from(instructions.len()).expect("a few instructions");
        let program = libc::sock_fprog {
            len,
            filter: instructions.as_ptr().cast_mut(),
        };
        Self {
            program,
            _instructions: PhantomData,
        }
    }

    /// The value of `SO_ATTACH_FILTER`.
    pub const fn program(&self) -> &libc::sock_fprog {
        &self.program
    }
}

fn instruction(code: u32, jt: usize, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: jt as u8,
        jf: 0,
        k,
    }
}

/// Instructions that keep the frames of the link of that index, and no others.
pub fn only_link(index: u32) -> Vec<libc::sock_filter> {
    vec![
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, LINK_OFFSET),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, index),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0),
        instruction(libc::BPF_RET | libc::BPF_K, 0, u32::MAX),
    ]
}

/// Instructions that drop a datagram if its first message has one of these ports. All messages of a
/// datagram have the same port.
pub fn drop_ports(ports: &[u32]) -> Vec<libc::sock_filter> {
    let mut program = vec![instruction(
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        0,
        PORT_OFFSET,
    )];
    for (index, port) in ports.iter().enumerate() {
        // BPF loads words in network byte order, but the header is in host byte order. A match
        // jumps to the last instruction, which drops.
        let to_drop = ports.len() - index;
        program.push(instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            to_drop,
            port.to_be(),
        ));
    }
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, u32::MAX));
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0));
    program
}
