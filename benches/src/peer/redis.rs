//! Owns a single Redis server that syncs every write, and the few commands of its protocol that a load
//! needs. The yardstick for one node: it replicates nothing.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::TcpStream;

use crate::failure::Failure;
use crate::peer::{find, version};
use crate::process::{Process, START_DEADLINE, free_ports};

/// Longest value that an answer may hold: beyond it the stream is out of step.
const BULK_BYTES_MAX: usize = 64 << 20;

/// A server that runs. Dropping it kills it and removes its data.
pub struct Redis {
    process: Process,
    address: SocketAddr,
    _dir: TempDir,
}

impl Redis {
    /// Starts a server and waits until it answers.
    pub async fn start(dir: &Path) -> Result<Redis, Failure> {
        let program = find("redis-server")?;
        let dir = tempfile::Builder::new().prefix("coracle-bench-redis-").tempdir_in(dir);
        let dir = dir.map_err(Failure::of("make a directory"))?;
        let address = free_ports(Ipv4Addr::LOCALHOST.into(), 1)?[0];
        let args = [
            ["--bind".to_owned(), address.ip().to_string()],
            ["--port".to_owned(), address.port().to_string()],
            ["--dir".to_owned(), dir.path().display().to_string()],
            ["--appendonly".to_owned(), "yes".to_owned()],
            ["--appendfsync".to_owned(), "always".to_owned()],
            ["--save".to_owned(), String::new()],
        ];
        let args = args.into_iter().flatten().collect::<Vec<_>>();
        let mut process = Process::start(&program, &args, dir.path().join("log"))?;
        let answers = || async move { Port::new(address).get(Bytes::from("ready")).await.is_ok() };
        process.wait_for(Instant::now() + START_DEADLINE, answers).await?;
        Ok(Redis { process, address, _dir: dir })
    }

    /// What it is.
    pub fn version() -> String {
        find("redis-server").map_or("none".to_owned(), |program| version(&program))
    }

    /// A caller, with a connection of its own.
    pub fn port(&self) -> Port {
        Port::new(self.address)
    }

    /// Processor time that it has used so far.
    pub fn processor_time(&self) -> Duration {
        self.process.processor_time()
    }
}

/// A caller. A clone has a connection of its own, made when it is first used.
pub struct Port {
    address: SocketAddr,
    stream: Option<BufStream<TcpStream>>,
}

impl Clone for Port {
    fn clone(&self) -> Port {
        Port::new(self.address)
    }
}

impl Port {
    fn new(address: SocketAddr) -> Port {
        Port { address, stream: None }
    }

    /// `GET`.
    pub async fn get(&mut self, key: Bytes) -> Result<Option<Bytes>, String> {
        match self.call(&[Bytes::from_static(b"GET"), key]).await? {
            Reply::Bulk(value) => Ok(value),
            Reply::Line(line) => Err(line),
        }
    }

    /// `SET`, or `MSET` of several.
    pub async fn put(&mut self, entries: Vec<(Bytes, Bytes)>) -> Result<(), String> {
        let mut command = vec![Bytes::from_static(b"MSET")];
        command.extend(entries.into_iter().flat_map(|(key, value)| [key, value]));
        match self.call(&command).await? {
            Reply::Line(line) if line == "+OK" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    }

    async fn call(&mut self, command: &[Bytes]) -> Result<Reply, String> {
        let answer = self.exchange(command).await;
        if answer.is_err() {
            // What comes next on it would be the answer to this.
            self.stream = None;
        }
        answer.map_err(|error| error.to_string())
    }

    async fn exchange(&mut self, command: &[Bytes]) -> std::io::Result<Reply> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address).await?;
                stream.set_nodelay(true)?;
                self.stream.insert(BufStream::new(stream))
            }
        };
        stream.write_all(&encode(command)).await?;
        stream.flush().await?;
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let line = line.trim_end();
        let Some(length) = line.strip_prefix('$') else {
            return Ok(Reply::Line(line.to_owned()));
        };
        if length == "-1" {
            return Ok(Reply::Bulk(None));
        }
        let length = length.parse().ok().filter(|length| *length <= BULK_BYTES_MAX);
        let length = length.ok_or_else(|| std::io::Error::other("no length of a value"))?;
        let mut value = vec![0; length + 2];
        stream.read_exact(&mut value).await?;
        value.truncate(length);
        Ok(Reply::Bulk(Some(value.into())))
    }
}

#[derive(Debug)]
enum Reply {
    Line(String),
    Bulk(Option<Bytes>),
}

fn encode(command: &[Bytes]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
    for part in command {
        bytes.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        bytes.extend_from_slice(part);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn commands_and_answers_are_redis() {
        assert_eq!(encode(&["GET".into(), "k".into()]), b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut port = Port::new(listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for answer in ["$3\r\na\r\n\r\n", "$-1\r\n", "+OK\r\n", "-ERR no\r\n"] {
                let mut asked = [0; 256];
                assert!(stream.read(&mut asked).await.unwrap() > 0);
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        assert_eq!(port.get("k".into()).await, Ok(Some("a\r\n".into())));
        assert_eq!(port.get("k".into()).await, Ok(None));
        assert_eq!(port.put(vec![("k".into(), "v".into())]).await, Ok(()));
        assert!(port.put(vec![("k".into(), "v".into())]).await.is_err_and(|e| e.contains("no")));
        server.await.unwrap();
    }
}
