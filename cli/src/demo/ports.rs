//! Owns the choice of free ports on this machine. Does not hold them: a server that starts later may
//! still find one taken, and says so.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;

use rand::{Rng, RngExt};

/// The ports of one node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ports {
    /// gRPC for clients.
    pub client: SocketAddr,
    /// Other nodes.
    pub peer: SocketAddr,
    /// Metrics and health.
    pub http: SocketAddr,
}

/// First client, peer and HTTP port of a demo: easy to remember, beside those of a lone server.
const PREFERRED: [u16; 3] = [7401, 7501, 7601];

/// Where others are looked for. Below what the kernel gives to outgoing connections: one of those
/// could take a port between its choice and its use, or while its node is down.
const OTHERS: Range<u16> = 10_000..32_000;

/// Tries before giving up: most ports of the range are free on any sane machine.
const TRIES_MAX: usize = 1_000;

/// The ports to be remembered, or others where one of those is taken. Says which it was.
pub fn preferred_or_free(nodes: usize, rng: &mut impl Rng) -> io::Result<(Vec<Ports>, bool)> {
    let preferred: Vec<Ports> = (0..nodes as u16)
        .map(|node| {
            let [client, peer, http] = PREFERRED.map(|first| local(first + node));
            Ports { client, peer, http }
        })
        .collect();
    let all = preferred.iter().flat_map(|ports| [ports.client, ports.peer, ports.http]);
    let held: io::Result<Vec<TcpListener>> = all.map(TcpListener::bind).collect();
    match held {
        Ok(_) => Ok((preferred, true)),
        Err(_) => free(nodes, OTHERS, rng).map(|ports| (ports, false)),
    }
}

/// Free ports of a range for so many nodes, in rising order.
pub fn free(nodes: usize, range: Range<u16>, rng: &mut impl Rng) -> io::Result<Vec<Ports>> {
    let mut held = Vec::new();
    for _ in 0..TRIES_MAX {
        if held.len() == nodes * 3 {
            break;
        }
        let port = rng.random_range(range.clone());
        // A port that is held here is taken for the next try, so none is chosen twice.
        if let Ok(listener) = TcpListener::bind(local(port)) {
            held.push((port, listener));
        }
    }
    if held.len() < nodes * 3 {
        return Err(io::Error::other(format!("no {} free ports in {range:?}", nodes * 3)));
    }
    let mut ports: Vec<SocketAddr> = held.iter().map(|(port, _)| local(*port)).collect();
    ports.sort();
    let (client, rest) = ports.split_at(nodes);
    let (peer, http) = rest.split_at(nodes);
    let each = client.iter().zip(peer).zip(http);
    Ok(each
        .map(|((client, peer), http)| Ports { client: *client, peer: *peer, http: *http })
        .collect())
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ports_are_distinct_and_free() {
        let ports = free(5, OTHERS, &mut rand::rng()).unwrap();
        let all = ports.iter().flat_map(|ports| [ports.client, ports.peer, ports.http]);
        let all: BTreeSet<SocketAddr> = all.collect();
        assert_eq!(all.len(), 15);
        assert!(all.iter().all(|address| OTHERS.contains(&address.port())));
        assert!(ports.is_sorted_by_key(|ports| ports.peer));
    }

    #[test]
    fn one_that_is_taken_moves_them_all() {
        // Whoever else holds it, it is taken now.
        let _held = TcpListener::bind(local(PREFERRED[0]));
        let (ports, is_preferred) = preferred_or_free(1, &mut rand::rng()).unwrap();
        assert!(!is_preferred);
        assert_ne!(ports[0].client.port(), PREFERRED[0]);
    }
}
