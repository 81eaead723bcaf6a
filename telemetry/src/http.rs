//! Asking admin ports. One question and one answer are all that is spoken, for which an HTTP client would be a lot.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Longest answer that is read, bytes; what is beyond is cut off.
const MOST_BYTES: u64 = 4 << 20;

/// Status and body of the answer to `GET path`. May be dropped at any time.
///
/// # Errors
/// When nobody answers in time, or not by HTTP.
pub async fn get(address: SocketAddr, path: &str, timeout: Duration) -> io::Result<(u16, String)> {
    tokio::time::timeout(timeout, exchange(address, path)).await?
}

async fn exchange(address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    // In HTTP/1.0 an answer ends with its connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.take(MOST_BYTES).read_to_string(&mut answer).await?;
    let status = |head: &str| head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok();
    let understood =
        answer.split_once("\r\n\r\n").and_then(|(head, body)| Some((status(head)?, body.to_owned())));
    understood.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an answer that is not HTTP"))
}
