//! Reading one's own writes from any replica, also in another process.
//!
//! `Consistency::Session` lets any replica answer that has come as far as this client has seen: cheap
//! reads near by that never go back. What was seen fits into some bytes, the session mark. A web
//! service puts them into a cookie: whichever process gets the user's next request takes them in, and
//! shows nothing older.
//!
//! ```sh
//! cargo run -p coracle-client --example session                      # in memory
//! cargo run -p coracle-client --example session -- 127.0.0.1:7401    # a cluster
//! ```

use coracle_client::testing::FakeCluster;
use coracle_client::{Client, Consistency, Error, SessionMark};

/// One process of a web service.
struct Process {
    kv: Client,
}

impl Process {
    /// `kv` must be a client of its own: what a client has seen belongs to all its handles.
    fn new(kv: &Client) -> Process {
        Process { kv: kv.with_consistency(Consistency::Session) }
    }

    /// Takes in what the user has seen, serves, and returns what the user has seen now.
    async fn rename(&self, cookie: &[u8], name: &str) -> Result<Vec<u8>, Error> {
        self.kv.take_in(&SessionMark::from_bytes(cookie.to_vec()))?;
        self.kv.put("example-profile/7", name.to_owned()).await?;
        Ok(self.kv.session_mark().as_bytes().to_vec())
    }

    async fn show(&self, cookie: &[u8]) -> Result<String, Error> {
        self.kv.take_in(&SessionMark::from_bytes(cookie.to_vec()))?;
        let entry = self.kv.get("example-profile/7").await?;
        let name = entry.map(|entry| entry.value).unwrap_or_default();
        Ok(String::from_utf8_lossy(&name).into_owned())
    }
}

/// Runs the example with the clients of two processes.
pub(crate) async fn run(one: &Client, other: &Client) -> Result<(), Error> {
    let (one, other) = (Process::new(one), Process::new(other));
    let mut cookie = Vec::new();
    for round in 0..20 {
        let name = format!("Ada {round}");
        let (writes, reads) = if round % 2 == 0 { (&one, &other) } else { (&other, &one) };
        cookie = writes.rename(&cookie, &name).await?;
        assert_eq!(reads.show(&cookie).await?, name, "the user's own write, wherever it went");
    }
    println!("session: 20 hand-overs, and every read had the write before it");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let fake = FakeCluster::start();
    let client = async || match std::env::args().nth(1) {
        Some(seeds) => Client::connect(&seeds).await,
        None => Ok(fake.client().await),
    };
    run(&client().await?, &client().await?).await
}
