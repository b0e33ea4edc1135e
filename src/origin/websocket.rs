//! A WebSocket that echoes each message (RFC 6455): the handshake, then frame by frame.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::BytesMut;
use http::Method;
use http::header::{CONNECTION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use pingora::tls::hash::{MessageDigest, hash};

use super::wire::{Broken, Request, Wire};

/// Maximum length of an echoed frame. A longer one closes the connection.
const FRAME_BYTES_MAX: u64 = 1 << 20;

const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The response to a handshake; `None` if the request is not one.
pub fn accept(request: &Request) -> Option<String> {
    let accept = accept_key(request)?;
    Some(format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    ))
}

/// The value of `Sec-WebSocket-Accept`, which proves that the server understood the handshake (RFC 6455 §4.2.2). `None`
/// if the request is not a handshake.
fn accept_key(request: &Request) -> Option<String> {
    let upgrade = request.method == Method::GET
        && request.names(CONNECTION, "upgrade")
        && request.names(UPGRADE, "websocket")
        && request.names(SEC_WEBSOCKET_VERSION, "13");
    let key = request.headers.get(SEC_WEBSOCKET_KEY).filter(|_| upgrade)?;
    let proof = [key.as_bytes(), b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    hash(MessageDigest::sha1(), &proof).ok().map(|digest| BASE64.encode(digest))
}

/// Echoes each message until the peer closes or breaks the protocol.
pub async fn echo(wire: &mut Wire) -> Result<(), Broken> {
    loop {
        let start = wire.exactly(2).await?;
        let (first, masked) = (start[0], start[1] & 0x80 != 0);
        let length = match start[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes(array(&wire.exactly(2).await?))),
            127 => u64::from_be_bytes(array(&wire.exactly(8).await?)),
            length => u64::from(length),
        };
        if !masked || length > FRAME_BYTES_MAX {
            return Ok(());
        }
        let mask: [u8; 4] = array(&wire.exactly(4).await?);
        let mut payload = BytesMut::from(wire.exactly(length as usize).await?);
        payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);

        match first & 0x0f {
            PONG => continue,
            PING => wire.send(&frame(first & 0xf0 | PONG, &payload)).await?,
            _ => wire.send(&frame(first, &payload)).await?,
        }
        if first & 0x0f == CLOSE {
            wire.close().await;
            return Ok(());
        }
    }
}

/// Encodes a frame of a server, which is unmasked.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ ..126 => frame.push(length as u8),
        length @ ..0x1_0000 => {
            frame.push(126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}

/// The `N` bytes that `Wire::exactly` returned.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}
