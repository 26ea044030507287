//! Owns an etcd cluster of three processes on this machine, with etcd's defaults but for the quota
//! that it needs to hold the data.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

use crate::failure::Failure;
use crate::peer::etcd_api::{Kv, PutRequest};
use crate::peer::{find, version};
use crate::process::{Process, START_DEADLINE, free_ports};

/// As etcd recommends for most.
const NODES: u8 = 3;

/// As large as etcd allows it without a warning.
const QUOTA_BYTES: u64 = 8 << 30;

/// A cluster that stands. Dropping it kills the nodes and removes their data.
pub struct Etcd {
    nodes: Vec<Process>,
    addresses: Vec<SocketAddr>,
    _dir: TempDir,
}

impl Etcd {
    /// Starts a cluster and waits until it takes writes.
    pub async fn start(dir: &Path) -> Result<Etcd, Failure> {
        let program = find("etcd")?;
        let dir = tempfile::Builder::new().prefix("coracle-bench-etcd-").tempdir_in(dir);
        let dir = dir.map_err(Failure::of("make a directory"))?;
        let ports = (1..=NODES).map(|node| {
            let ports = free_ports(IpAddr::V4(Ipv4Addr::new(127, 0, 0, node)), 2)?;
            Ok((ports[0], ports[1]))
        });
        let ports = ports.collect::<Result<Vec<_>, Failure>>()?;
        let members = ports.iter().enumerate();
        let members: Vec<String> =
            members.map(|(at, (_, peer))| format!("n{at}=http://{peer}")).collect();
        let start = |(at, (client, peer)): (usize, &(SocketAddr, SocketAddr))| {
            let args = [
                format!("--name=n{at}"),
                format!("--data-dir={}", dir.path().join(format!("n{at}")).display()),
                format!("--listen-client-urls=http://{client}"),
                format!("--advertise-client-urls=http://{client}"),
                format!("--listen-peer-urls=http://{peer}"),
                format!("--initial-advertise-peer-urls=http://{peer}"),
                format!("--initial-cluster={}", members.join(",")),
                "--initial-cluster-state=new".to_owned(),
                format!("--quota-backend-bytes={QUOTA_BYTES}"),
                "--logger=zap".to_owned(),
                "--log-level=error".to_owned(),
            ];
            Process::start(&program, &args, dir.path().join(format!("n{at}.log")))
        };
        let mut nodes = ports.iter().enumerate().map(start).collect::<Result<Vec<_>, _>>()?;
        let addresses: Vec<SocketAddr> = ports.iter().map(|(client, _)| *client).collect();
        let deadline = Instant::now() + START_DEADLINE;
        for (process, address) in nodes.iter_mut().zip(&addresses) {
            let kv = Kv::new(dial(*address)?);
            let answers = || {
                let mut kv = kv.clone();
                let put = PutRequest { key: "ready".into(), value: Bytes::new() };
                async move { kv.put(put).await.is_ok() }
            };
            process.wait_for(deadline, answers).await?;
        }
        Ok(Etcd { nodes, addresses, _dir: dir })
    }

    /// What it is.
    pub fn version() -> String {
        find("etcd").map_or("none".to_owned(), |program| version(&program))
    }

    /// So many connections, to the nodes in turn.
    pub fn connect(&self, connections: usize) -> Result<Vec<Kv>, Failure> {
        let addresses = self.addresses.iter().cycle().take(connections);
        addresses.map(|address| dial(*address).map(Kv::new)).collect()
    }

    /// Processor time that all nodes have used so far.
    pub fn processor_time(&self) -> Duration {
        self.nodes.iter().map(Process::processor_time).sum()
    }
}

/// A connection that stands when it is first used.
pub fn dial(address: SocketAddr) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(Failure::of(format!("dial {address}")))?;
    Ok(endpoint.tcp_nodelay(true).connect_lazy())
}
