//! One GET over one connection.
use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use crate::config::ApiConfig;

#[derive(Clone, Debug)]
pub(super) struct Client(String);

impl Client {
    pub(super) fn new(api: &ApiConfig) -> Self {
        Self(api.listen.clone())
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let stream = TcpStream::connect(&self.0)
            .await
            .context("no daemon answers")?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = hyper::Request::get(path).header("host", &self.0);
        let response = sender
            .send_request(request.body(Empty::<Bytes>::new())?)
            .await?;
        ensure!(
            response.status().is_success(),
            "{path}: {}",
            response.status()
        );
        let bytes = response.into_body().collect().await?.to_bytes();
        connection.abort();
        Ok(serde_json::from_slice(&bytes)?)
    }
}
