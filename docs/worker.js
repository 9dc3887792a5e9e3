// Browsers start no worker from a file on the disk, and the search is one: there, its script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inner = frame.contentWindow
      const add = source =>
        new Promise((done, failed) => {
          const script = inner.document.createElement("script")
          Object.assign(script, {src: new URL(source, document.baseURI), onload: done, onerror: failed})
          inner.document.body.append(script)
        })
      const tell = data => {
        const event = new MessageEvent("message", {data})
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      inner.document.open()
      inner.document.write("<!doctype html><body></body>")
      inner.document.close()
      inner.importScripts = (...sources) => sources.reduce((before, source) => before.then(() => add(source)), Promise.resolve())
      this.send = data => inner.dispatchEvent(new inner.MessageEvent("message", {data}))
      inner.postMessage = tell
      this.ready = add(url)
    }
    postMessage(data) {
      this.ready.then(() => this.send(data))
    }
    terminate() {}
  }
}
