//! States of a session, and why it leaves them.

use crate::notification::Notification;

/// State of a session (RFC 4271 section 8.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// No connection is made or taken: stopped, or waiting after an error.
    Idle,
    /// A connection is being made.
    Connect,
    /// Connections are taken; the next one is made when the timer runs out.
    Active,
    /// Our OPEN is out.
    OpenSent,
    /// The peer's OPEN is in.
    OpenConfirm,
    /// Routes are exchanged.
    Established,
}

/// Why an established session or an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// We sent a NOTIFICATION.
    Sent(Notification, String),
    /// The peer sent a NOTIFICATION.
    Received(Notification),
    /// The connection ended or broke.
    Closed,
    /// No connection came about.
    Unreachable,
    /// The peer connected anew after a restart (RFC 4724 section 4.2).
    Restarted,
    /// We stopped it silently, so that the peer keeps our routes.
    Stopped,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sent(notification, detail) if detail.is_empty() => {
                write!(f, "sent {notification}")
            }
            Self::Sent(notification, detail) => write!(f, "sent {notification}: {detail}"),
            Self::Received(notification) => write!(f, "received {notification}"),
            Self::Closed => f.write_str("the connection ended"),
            Self::Unreachable => f.write_str("no connection"),
            Self::Restarted => f.write_str("the peer has restarted"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}
