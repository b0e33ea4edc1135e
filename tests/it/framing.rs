//! How messages are marked off, byte by byte and over real sockets: what passes, how it leaves, and what is refused.
//! The tables of the decisions themselves are beside them, in `src/framing`.

mod answers;
mod halves;
mod http2;
mod peers;
mod requests;
