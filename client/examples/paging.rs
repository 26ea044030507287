//! Paging through an entity: the comments of a post, a page at a time, each page served by whichever
//! process gets the user's request; nothing is missing and nothing comes twice.
//!
//! A scan reads at one version. Its resume token carries that version and the last key, so the next
//! page shows the same state whatever was written since, and whoever serves it; for as long as the
//! keyspace's history reaches back (60 s). After that the error is `VersionGone`, and the list is to
//! be shown anew.
//!
//! ```sh
//! cargo run -p coracle-client --example paging                      # in memory
//! cargo run -p coracle-client --example paging -- 127.0.0.1:7401    # a cluster
//! ```

use coracle_client::admin::NewKeyspace;
use coracle_client::testing::FakeCluster;
use coracle_client::{Client, EntityRule, Error, ErrorKind, Keyspace};
use futures_util::TryStreamExt;

const COMMENTS: usize = 60;
const PAGE_BYTES: u32 = 16 << 10;

/// What a user gets.
pub(crate) struct Shown {
    pub(crate) comments: Vec<String>,
    /// To be sent for the next page, if there is one.
    pub(crate) next: Option<Vec<u8>>,
}

/// The page behind `token`, the first where that is empty.
pub(crate) async fn page(kv: &Keyspace, post: u32, token: Vec<u8>) -> Result<Shown, Error> {
    let scan = kv.scan(..).prefix(format!("{post}/")).page_bytes(PAGE_BYTES).resume(token);
    let page = scan.pages().try_next().await?.expect("a scan has at least one page");
    let text = |value: &[u8]| String::from_utf8_lossy(value).trim_end().to_owned();
    let comments = page.entries.iter().map(|entry| text(&entry.value)).collect();
    let next = (!page.is_last).then(|| page.resume_token.to_vec());
    Ok(Shown { comments, next })
}

/// Runs the example with the clients of two processes, which take turns.
pub(crate) async fn run(one: &Client, other: &Client) -> Result<(), Error> {
    let rule = EntityRule::Delimiter(b'/');
    let new = NewKeyspace { entity_rule: rule, ..NewKeyspace::new("example-comments") };
    one.admin().create_keyspace(new).await?;
    let (one, other) = (one.keyspace("example-comments"), other.keyspace("example-comments"));
    let comment = |number: usize| format!("comment {number}");
    for number in 0..COMMENTS {
        // About a thousand bytes each.
        let padded = format!("{:<1000}", comment(number));
        one.put(format!("1/{number:04}"), padded).await?;
    }
    one.delete("1/9999").await?;

    let (mut shown, mut next, mut pages) = (Vec::new(), Some(Vec::new()), 0);
    while let Some(token) = next {
        let process = if pages % 2 == 0 { &one } else { &other };
        let found = match page(process, 1, token).await {
            Err(error) if error.kind() == ErrorKind::VersionGone => panic!("show it anew: {error}"),
            found => found?,
        };
        shown.extend(found.comments);
        next = found.next;
        pages += 1;
        // Somebody writes meanwhile. It is on nobody's next page, but in the next list.
        one.put("1/9999", "written meanwhile").await?;
        one.put("1/0059", "changed meanwhile").await?;
    }
    assert_eq!(shown, (0..COMMENTS).map(comment).collect::<Vec<_>>());
    println!("paging: {} comments on {pages} pages", shown.len());
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
