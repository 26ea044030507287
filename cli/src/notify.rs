//! What a service manager is told of this process, by systemd's protocol: one datagram to the socket that
//! `$NOTIFY_SOCKET` names. Owns the socket and the words. Does nothing where nobody asks to be told.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Tells the service manager, if there is one.
pub struct Notifier {
    socket: Option<OsString>,
}

impl Notifier {
    /// By this process's environment.
    pub fn from_env() -> Notifier {
        Notifier { socket: std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) }
    }

    /// The node is up: it listens, and what its log holds was replayed.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={status}"));
    }

    /// The node ends.
    pub fn stopping(&self, status: &str) {
        self.tell(&format!("STOPPING=1\nSTATUS={status}"));
    }

    fn tell(&self, what: &str) {
        let Some(name) = &self.socket else { return };
        // Nobody who serves requests gives up because nobody listens here.
        if let Err(error) = send(name, what) {
            tracing::warn!(%error, socket = %name.display(), "the service manager is not told");
        }
    }
}

/// A name that begins with `@` is of the abstract namespace, any other is a path.
fn send(name: &OsStr, what: &str) -> std::io::Result<()> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let bytes = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..bytes].to_vec()).unwrap()
    }

    #[test]
    fn paths_and_abstract_names_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier { socket: Some(path.into()) };
        notifier.ready("serving");
        assert_eq!(heard(&socket), "READY=1\nSTATUS=serving");
        let name = format!("coracle-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        let notifier = Notifier { socket: Some(format!("@{name}").into()) };
        notifier.stopping("handing over");
        assert_eq!(heard(&socket), "STOPPING=1\nSTATUS=handing over");
    }

    #[test]
    fn where_nobody_listens_nothing_happens() {
        Notifier { socket: None }.ready("serving");
        Notifier { socket: Some("/nowhere/at-all".into()) }.ready("serving");
    }
}
