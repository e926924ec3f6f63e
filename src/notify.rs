//! Tells a service manager how the server is: a datagram to the socket that `NOTIFY_SOCKET` names, as systemd's
//! `Type=notify` wants it. Nothing happens where nobody asked.

use std::ffi::OsStr;
use std::io::Result;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The log is replayed, and requests are answered.
pub const READY: &str = "READY=1";
/// The server stops.
pub const STOPPING: &str = "STOPPING=1";

/// Tells the service manager, if there is one.
pub fn tell(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&socket, state) {
        tracing::warn!(%error, ?socket, state, "cannot tell the service manager");
    }
}

fn send(socket: &OsStr, state: &str) -> Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_abstract_names() {
        let receive = |socket: &UnixDatagram| {
            let mut buffer = [0; 64];
            let len = socket.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..len]).into_owned()
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), READY).unwrap();
        assert_eq!(receive(&socket), "READY=1");
        let name = format!("thalweg-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(OsStr::new(&format!("@{name}")), STOPPING).unwrap();
        assert_eq!(receive(&socket), "STOPPING=1");
        assert!(send(OsStr::new("/nowhere/at/all"), READY).is_err());
    }
}
