//! A classic packet filter (`linux/filter.h`) that keeps a socket's own changes from waking it.

use std::marker::PhantomData;

/// Offset of `nlmsg_pid` in a message header.
const PORT: u32 = 12;

/// A filter program, which points at its own instructions.
pub struct Filter<'a> {
    program: libc::sock_fprog,
    _instructions: PhantomData<&'a [libc::sock_filter]>,
}

impl<'a> Filter<'a> {
    /// Borrows a handful of instructions.
    pub fn new(instructions: &'a [libc::sock_filter]) -> Self {
        let len = u16::try_from(instructions.len()).expect("a handful of instructions");
        let program = libc::sock_fprog { len, filter: instructions.as_ptr().cast_mut() };
        Self { program, _instructions: PhantomData }
    }

    /// What `SO_ATTACH_FILTER` takes.
    pub const fn program(&self) -> &libc::sock_fprog {
        &self.program
    }
}

/// Drops datagrams whose first message was caused by one of these ports; all messages of a datagram have one cause.
pub fn drop_ports(ports: &[u32]) -> Vec<libc::sock_filter> {
    let instruction = |code: u32, jt: usize, k: u32| libc::sock_filter { code: code as u16, jt: jt as u8, jf: 0, k };
    let mut program = vec![instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, PORT)];
    for (index, port) in ports.iter().enumerate() {
        // The filter loads in network order what the kernel wrote in its own; a match jumps to the last instruction.
        let to_drop = ports.len() - index;
        program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, to_drop, port.to_be()));
    }
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, u32::MAX));
    program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0));
    program
}
